"""DeepSpeed's ZeRO, for models of which each process runs what its rows want."""
