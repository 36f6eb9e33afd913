"""Engine: data, rollout, trainers, rewards, evaluation, reports. Knows no model by name; may import `kernels`, never `models`."""
