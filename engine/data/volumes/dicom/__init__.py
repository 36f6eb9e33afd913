"""DICOM series and multi-frame files as volumes, and segmentations of them."""
