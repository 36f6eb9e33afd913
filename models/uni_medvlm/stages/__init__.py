"""The five stages of Uni-MedVLM: what each trains, the files it leaves for the next, and the experts that stages 2 and 3 become."""
