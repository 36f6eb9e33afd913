"""DICOM series and multi-frame files that tests make: small, whole, of any orientation."""

import itertools
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING = (2.5, 0.8, 0.6)  # mm: slices, rows, columns
SIGNED = [  # the 48 turns and mirrorings of three axes
    np.array(signs)[:, None] * np.eye(3)[list(order)]
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def oblique(seed: int) -> np.ndarray:
    """[3, 3], a rotation."""
    turned, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return turned * np.sign(np.linalg.det(turned))


def affine_of(directions: np.ndarray, spacing=SPACING, origin=(-31.0, 12.5, 77.0)) -> np.ndarray:
    """[4, 4] with the columns of `directions` [3, 3] for slice, row and column."""
    made = np.eye(4)
    made[:3, :3], made[:3, 3] = directions * np.array(spacing), origin
    return made


def voxels_of(shape=(5, 12, 9), seed=0) -> np.ndarray:
    """Distinct values, as Hounsfield units."""
    return np.random.default_rng(seed).permutation(int(np.prod(shape))).reshape(shape).astype(np.int16) - 200


def item(**values) -> Sequence:
    return Sequence([named(Dataset(), **values)])


def named(dataset: Dataset, **values) -> Dataset:
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def header(storage=CTImageStorage, **values) -> Dataset:
    """What every file of a study says."""
    dataset = Dataset()
    dataset.file_meta = named(FileMetaDataset(), TransferSyntaxUID=ExplicitVRLittleEndian, MediaStorageSOPClassUID=storage)
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    said = {"SOPClassUID": storage, "SOPInstanceUID": dataset.file_meta.MediaStorageSOPInstanceUID, "Modality": "CT"}
    said |= {"PatientName": "", "PatientID": "p", "PatientBirthDate": "", "PatientSex": "", "StudyDate": "", "StudyTime": ""}
    said |= {"StudyInstanceUID": "2.25.1", "SeriesInstanceUID": "2.25.2", "FrameOfReferenceUID": "2.25.3", "StudyID": ""}
    said |= {"AccessionNumber": "", "ReferringPhysicianName": "", "SeriesNumber": 1, "InstanceNumber": 1, "Manufacturer": ""}
    said |= {"PositionReferenceIndicator": "", "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    said |= {
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    }
    return named(dataset, **said | values)


def write_series(folder: Path, voxels: np.ndarray, affine: np.ndarray, change=None, seed=0, **values) -> list[Path]:
    """A file a slice, their names and numbers in no order; `change(index, dataset)` before each is written."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(seed).permutation(len(voxels))
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    paths = []
    for index, pixels in enumerate(voxels):
        dataset = header(**values)
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.InstanceNumber = int(names[index]) + 1
        dataset.ImagePositionPatient = [float(f"{number:.10g}") for number in (affine @ [index, 0, 0, 1])[:3]]
        dataset.ImageOrientationPatient = [float(f"{n:.12f}") for n in (affine[:3, [2, 1]] / lengths[[2, 1]]).T.reshape(6)]
        dataset.PixelSpacing, dataset.SliceThickness = [float(side) for side in lengths[1:]], float(lengths[0])
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
        dataset.PixelData = (pixels + 1024).astype(np.int16).tobytes()
        if change:
            change(index, dataset)
        paths.append(folder / f"{names[index]:03d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_enhanced(path: Path, voxels: np.ndarray, affine: np.ndarray, order: list[int]) -> Path:
    """One file whose frames lie in `order`, each with a place and a rescale of its own."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    dataset = header(EnhancedCTImageStorage, NumberOfFrames=len(voxels), BurnedInAnnotation="NO")
    dataset.Rows, dataset.Columns = voxels.shape[1:]
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=list((affine[:3, [2, 1]] / lengths[[2, 1]]).T.reshape(6)))
    shared.PixelMeasuresSequence = item(PixelSpacing=list(lengths[1:]), SliceThickness=lengths[0])
    dataset.SharedFunctionalGroupsSequence, groups, stored = Sequence([shared]), [], []
    for index in order:
        group = Dataset()
        group.PlanePositionSequence = item(ImagePositionPatient=list((affine @ [index, 0, 0, 1])[:3]))
        group.PixelValueTransformationSequence = item(RescaleSlope=1, RescaleIntercept=-1000 - index, RescaleType="HU")
        group.FrameContentSequence = item(DimensionIndexValues=[index + 1], StackID="1", InStackPositionNumber=index + 1)
        groups.append(group)
        stored.append(voxels[index] + 1000 + index)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(groups)
    dataset.PixelData = np.stack(stored).astype(np.int16).tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path
