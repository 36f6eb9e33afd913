"""The tokens that Uni-MedVLM adds to those of its language model, in the order of their ids."""

SEG, IMAGE, REGION, REGION_END, REGION_FEATURE = NEW_TOKENS = ("<SEG>", "<image>", "<region>", "</region>", "<region_feature>")
