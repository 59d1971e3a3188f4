"""Data sets of images that `arrowhead fetch` knows by name.

The addresses are those of the publishers, or of fast.ai for the sets that it made. The hashes are
those that torchvision, TensorFlow Datasets, fastai or Zenodo record for these addresses. Where
a publisher has replaced a file since, these projects record different hashes, and each is accepted.

The terms are short forms of what the publishers say, at `KnownDataset.page` and here:

    Asirra (cats and dogs)     the licence that Microsoft's download page shows, and Kaggle's rules
    ImageNet                   https://www.image-net.org/download.php
    Imagenette, Imagewoof      LICENSE in https://github.com/fastai/imagenette
    Oxford-IIIT pets, DTD      the pages of the data sets at robots.ox.ac.uk
    flowers                    LICENSE.txt in the archive: each photographer and licence
    EuroSAT                    the licence field of the Zenodo record; for the images below it,
                               https://sentinels.copernicus.eu (Sentinel Data Legal Notice)
    beans                      LICENSE in https://github.com/AI-Lab-Makerere/ibean
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from arrowhead.errors import DataError
from arrowhead.spreadsheet import open_csv

LABELS_TABLE = "labels.csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownArchive:
    """An archive that belongs to a data set.

    Attributes:
        url: Where its publisher offers it.
        size: Bytes, for the list of data sets.
        digests: See `download.RemoteFile.digests`.
    """

    url: str
    size: int
    digests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownDataset:
    """A data set that can be fetched by name.

    Attributes:
        name: What `fetch` calls it.
        description: What it contains.
        terms: What its publisher allows, in short.
        page: Where the publisher describes it, with the full terms.
        archives: What to download.
        data: What `fit` reads, relative to the folder that it is fetched to.
        prepare: Adds to the unpacked folder what is missing, and returns the names of new files.
    """

    name: str
    description: str
    terms: str
    page: str
    archives: tuple[KnownArchive, ...]
    data: str
    prepare: Callable[[Path], list[str]] | None = None

    @property
    def size(self) -> int:
        """Bytes of all archives."""
        return sum(archive.size for archive in self.archives)


def write_pets_labels(folder: Path) -> list[str]:
    """Write labels.csv for the Oxford-IIIT pets: path, label (breed), species, split.

    The images lie in one folder and have the breed in their names; the lists of the publisher's
    split (annotations/trainval.txt, test.txt) have lines such as `Abyssinian_100 1 1 1`: name,
    class, species (1 cat, 2 dog), breed.

    Args:
        folder: Where both archives were unpacked.

    Returns:
        The name of the table.

    Raises:
        DataError: A list is missing or has another form.
    """
    rows = []
    for name, split in (("trainval.txt", "train"), ("test.txt", "test")):
        path = folder / "annotations" / name
        try:
            lines = path.read_text("utf-8").splitlines()
            for line in lines:
                if line.strip() and not line.startswith("#"):
                    image, _, species, _ = line.split()
                    breed = image.rpartition("_")[0]
                    kind = {"1": "cat", "2": "dog"}[species]
                    rows.append([f"images/{image}.jpg", breed, kind, split])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{name} of the Oxford-IIIT pets is not as expected: {error!r}.",
                "annotations/trainval.txt and test.txt with lines such as `Abyssinian_100 1 1 1`.",
                "report it: the publisher has changed the archive.",
            ) from error
    with open_csv(folder / LABELS_TABLE, ["path", "label", "species", "split"]) as table:
        for row in sorted(rows):
            table.row(row)
    return [LABELS_TABLE]


_FAST_AI = "https://s3.amazonaws.com/fast-ai-imageclas"
_IMAGENET_TERMS = (
    "photos of ImageNet: non-commercial research and education only; selection and labels by"
    " fast.ai: Apache-2.0"
)
_ASIRRA_TERMS = "photos of Microsoft Research (Asirra): non-commercial research; no republishing"
_IMAGENETTE_PAGE = "https://github.com/fastai/imagenette"
_PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets"
_BEANS = "https://storage.googleapis.com/ibeans"

DATASETS: dict[str, KnownDataset] = {
    dataset.name: dataset
    for dataset in (
        KnownDataset(
            name="dogs-vs-cats",
            description="25,000 photos of dogs and cats in train/ and valid/, as in fast.ai's"
            " course",
            terms=_ASIRRA_TERMS,
            page="https://www.kaggle.com/c/dogs-vs-cats/rules",
            archives=(
                KnownArchive(
                    url="https://s3.amazonaws.com/fast-ai-sample/dogscats.tgz",
                    size=839_285_364,
                    digests=("md5:3e483c8d6ef2175e9d395a6027eb92b7",),
                ),
            ),
            data="dogscats",
        ),
        KnownDataset(
            name="cats-and-dogs-microsoft",
            description="the same photos as Microsoft publishes them, with some unreadable ones",
            terms=_ASIRRA_TERMS,
            page="https://www.microsoft.com/en-us/download/details.aspx?id=54765",
            archives=(
                KnownArchive(
                    url="https://download.microsoft.com/download/3/E/1/"
                    "3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip",
                    size=824_887_076,
                    digests=(
                        "sha256:b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9",
                    ),
                ),
            ),
            data="PetImages",
        ),
        KnownDataset(
            name="imagenette-160",
            description="13,394 photos of ten ImageNet classes, shorter side 160 pixels",
            terms=_IMAGENET_TERMS,
            page=_IMAGENETTE_PAGE,
            archives=(
                KnownArchive(
                    url=f"{_FAST_AI}/imagenette2-160.tgz",
                    size=98_948_031,
                    digests=(
                        "sha256:88daccb09b6fce93f45e6c09ddeb269cce705549e6bff322092a2a5a11489863",
                        "md5:e793b78cc4c9e9a4ccc0c1155377a412",
                        "md5:c475f8f7617a200ba35b9facc48443c3",
                    ),
                ),
            ),
            data="imagenette2-160",
        ),
        KnownDataset(
            name="imagenette-320",
            description="13,394 photos of ten ImageNet classes, shorter side 320 pixels",
            terms=_IMAGENET_TERMS,
            page=_IMAGENETTE_PAGE,
            archives=(
                KnownArchive(
                    url=f"{_FAST_AI}/imagenette2-320.tgz",
                    size=341_553_947,
                    digests=(
                        "sha256:5020a9130cea0348272823cb12d2db7e981c6f2afa3dce71ccd5b8013005c55e",
                        "md5:3df6f0d01a2c9592104656642f5e78a3",
                        "md5:1f1f74f133caff120e575856659b87a2",
                    ),
                ),
            ),
            data="imagenette2-320",
        ),
        KnownDataset(
            name="imagenette",
            description="13,394 photos of ten ImageNet classes in their original size",
            terms=_IMAGENET_TERMS,
            page=_IMAGENETTE_PAGE,
            archives=(
                KnownArchive(
                    url=f"{_FAST_AI}/imagenette2.tgz",
                    size=1_556_914_727,
                    digests=(
                        "sha256:de32de18a7d8df0114d5e2c3c14cafb9558e8f00441a73aa7953681ad02be49c",
                        "md5:fe2fc210e6bb7c5664d602c3cd71e612",
                        "md5:2c774ecb40005b35d7937d50f5d42336",
                    ),
                ),
            ),
            data="imagenette2",
        ),
        KnownDataset(
            name="imagewoof-160",
            description="12,954 photos of ten breeds of dogs in ImageNet, shorter side 160 pixels",
            terms=_IMAGENET_TERMS,
            page=_IMAGENETTE_PAGE,
            archives=(
                KnownArchive(
                    url=f"{_FAST_AI}/imagewoof2-160.tgz",
                    size=92_612_825,
                    digests=(
                        "md5:3559b194123981a540b87132dbda412f",
                        "sha256:663c22f69c2802d85e2a67103c017e047096702ffddf9149a14011b7002539bf",
                    ),
                ),
            ),
            data="imagewoof2-160",
        ),
        KnownDataset(
            name="imagewoof-320",
            description="12,954 photos of ten breeds of dogs in ImageNet, shorter side 320 pixels",
            terms=_IMAGENET_TERMS,
            page=_IMAGENETTE_PAGE,
            archives=(
                KnownArchive(
                    url=f"{_FAST_AI}/imagewoof2-320.tgz",
                    size=328_387_740,
                    digests=(
                        "md5:7a1fd92672a559a85de76e4810a20c21",
                        "sha256:4e4905ed7643120daaf9bf3b2ef7f3a7e8396d9bdaf254a38c6f01f618b4973d",
                    ),
                ),
            ),
            data="imagewoof2-320",
        ),
        KnownDataset(
            name="oxford-pets",
            description="7,349 photos of 37 breeds of cats and dogs, with a table of breed and"
            " species",
            terms="CC BY-SA 4.0",
            page=f"{_PETS}/",
            archives=(
                KnownArchive(
                    url=f"{_PETS}/data/images.tar.gz",
                    size=791_918_971,
                    digests=(
                        "sha256:67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d",
                        "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c",
                    ),
                ),
                KnownArchive(
                    url=f"{_PETS}/data/annotations.tar.gz",
                    size=19_173_078,
                    digests=(
                        "sha256:52425fb6de5c424942b7626b428656fcbd798db970a937df61750c0f1d358e91",
                        "md5:95a8c909bbe2e81eed6a22bccdf3f68f",
                    ),
                ),
            ),
            data=LABELS_TABLE,
            prepare=write_pets_labels,
        ),
        KnownDataset(
            name="flowers",
            description="3,670 photos of five kinds of flowers, from TensorFlow's tutorials",
            terms="CC BY 2.0, photographers named in LICENSE.txt",
            page="https://www.tensorflow.org/datasets/catalog/tf_flowers",
            archives=(
                KnownArchive(
                    url="https://storage.googleapis.com/download.tensorflow.org/example_images/"
                    "flower_photos.tgz",
                    size=228_813_984,
                    digests=(
                        "sha256:4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c",
                    ),
                ),
            ),
            data="flower_photos",
        ),
        KnownDataset(
            name="eurosat",
            description="27,000 satellite images (64 x 64 pixels) of ten kinds of land use",
            terms="MIT; Copernicus Sentinel data: free use with attribution",
            page="https://zenodo.org/records/7711810",
            archives=(
                KnownArchive(
                    url="https://zenodo.org/records/7711810/files/EuroSAT_RGB.zip",
                    size=94_658_721,
                    digests=(
                        "md5:f46e308c4d50d4bf32fedad2d3d62f3b",
                        "sha256:b4f5b234ecb7d7ff9c6cddb046543b4717c53fd6e9815be6c0e80cc614f51b90",
                    ),
                ),
            ),
            data="EuroSAT_RGB",
        ),
        KnownDataset(
            name="beans",
            description="1,295 photos of bean leaves, healthy or with one of two diseases, in"
            " three splits",
            terms="MIT",
            page="https://github.com/AI-Lab-Makerere/ibean",
            archives=(
                KnownArchive(
                    url=f"{_BEANS}/train.zip",
                    size=143_812_152,
                    digests=(
                        "sha256:284fe8456ce20687f4367ae7ad94a64577e7f9fde2c2c6b1c74340ab5dc82715",
                    ),
                ),
                KnownArchive(
                    url=f"{_BEANS}/validation.zip",
                    size=18_504_213,
                    digests=(
                        "sha256:90b7aa1c26d91d9afff07a30bbc67a5ea34f1f1397f068d8675be09d7d0c602d",
                    ),
                ),
                KnownArchive(
                    url=f"{_BEANS}/test.zip",
                    size=17_708_541,
                    digests=(
                        "sha256:ca67b15d960d1e2fd9d23fd8498ce86818ead90755c630a43baf19ec4af09312",
                    ),
                ),
            ),
            data="",
        ),
        KnownDataset(
            name="textures",
            description="5,640 photos of 47 kinds of textures (DTD)",
            terms="for research",
            page="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
            archives=(
                KnownArchive(
                    url="https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
                    size=625_239_812,
                    digests=(
                        "sha256:e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205",
                        "md5:fff73e5086ae6bdbea199a49dfb8a4c1",
                    ),
                ),
            ),
            data="dtd/images",
        ),
    )
}
