"""From prompts to answers: what a model must offer (the policy), sampling, and the loop over tokens."""
