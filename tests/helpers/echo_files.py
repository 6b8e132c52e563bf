"""Echocardiograms as hospitals write them: DICOM files and movies made by their own libraries."""

import io

import av
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence


def movie(suffix: str, codec: str, frames: np.ndarray, aspect: int = 1) -> bytes:
    """A video of grey frames [T,H,W], whose pixels are `aspect` times as wide as high."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format={".avi": "avi", ".mp4": "mp4"}[suffix]) as container:
        stream = container.add_stream(codec, rate=25, options={"qscale": "1"})
        stream.width, stream.height = frames.shape[:0:-1]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for frame in [*(av.VideoFrame.from_ndarray(frame, format="gray") for frame in frames), None]:
            for packet in stream.encode(frame):
                container.mux(packet)
    return buffer.getvalue()


def dicom(pixels: np.ndarray, photometric: str = "MONOCHROME2", region: dict | None = None, syntax: str = "", **tags) -> bytes:
    """A DICOM file of pixels [T,H,W] or [T,H,W,3]; `region` holds what differs from a tissue region over all of it."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = pixels.shape[:3]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3 if pixels.ndim == 4 else 1, photometric
    if pixels.ndim == 4:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, 0
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    if region is not None:
        item = Dataset()
        defaults = {
            "RegionSpatialFormat": 1, "RegionDataType": 1, "RegionFlags": 0, "RegionLocationMinX0": 0, "RegionLocationMinY0": 0,
            "RegionLocationMaxX1": pixels.shape[2] - 1, "RegionLocationMaxY1": pixels.shape[1] - 1,
            "PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3, "PhysicalDeltaX": 0.05, "PhysicalDeltaY": 0.04,
        }  # fmt: skip
        for name, value in (defaults | region).items():
            setattr(item, name, value)
        dataset.SequenceOfUltrasoundRegions = Sequence([item])
    for name, value in tags.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


LOOP = np.random.default_rng(1).integers(0, 256, (3, 100, 80)).astype(np.uint8)
