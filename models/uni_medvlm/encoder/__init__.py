"""FILA's hybrid encoder: CLIP's ViT, which takes in a ConvNeXt's maps, in one piece or in tiles."""
