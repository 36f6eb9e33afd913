"""The SAM family: TinySAM, LiteMedSAM, SAM-Med2D and SAM's own sizes, under the state-dict keys of their checkpoints."""
