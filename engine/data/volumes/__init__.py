"""Volumes: DICOM and NIfTI, read with their place in the patient; structures carried through their slices; masks written back."""
