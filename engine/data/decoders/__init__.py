"""Files of more than eight bits a value, and DICOM, as arrays: what PIL alone reads with a loss, or not at all."""
