"""A trimmed folder: its file names, its manifest, opening and checking it, writing it."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.folder.manifest import CutTensor as CutTensor
    from trimserve.folder.manifest import FileEntry as FileEntry
    from trimserve.folder.manifest import Manifest as Manifest
    from trimserve.folder.manifest import Source as Source
    from trimserve.folder.manifest import is_trimmed as is_trimmed
    from trimserve.folder.manifest import read_manifest as read_manifest
    from trimserve.folder.manifest import stored_weight_bytes as stored_weight_bytes
    from trimserve.folder.manifest import with_verification as with_verification
    from trimserve.folder.manifest import write_manifest as write_manifest
    from trimserve.folder.names import COLD_NAME as COLD_NAME
    from trimserve.folder.names import COLD_PREFIX as COLD_PREFIX
    from trimserve.folder.names import GRAPH_FOLDER as GRAPH_FOLDER
    from trimserve.folder.names import MANIFEST_NAME as MANIFEST_NAME
    from trimserve.folder.names import TOKENIZER_NAME as TOKENIZER_NAME
    from trimserve.folder.names import VOCAB_NAME as VOCAB_NAME
    from trimserve.folder.names import check_plain_name as check_plain_name
    from trimserve.folder.opening import TrimmedFolder as TrimmedFolder
    from trimserve.folder.opening import list_files as list_files
    from trimserve.folder.opening import open_folder as open_folder
    from trimserve.folder.tasks import GENERATION_TASK as GENERATION_TASK
    from trimserve.folder.tasks import GENERATOR_TASKS as GENERATOR_TASKS
    from trimserve.folder.tasks import TEXT2TEXT_TASK as TEXT2TEXT_TASK

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "COLD_NAME": "trimserve.folder.names",
        "COLD_PREFIX": "trimserve.folder.names",
        "CutTensor": "trimserve.folder.manifest",
        "FileEntry": "trimserve.folder.manifest",
        "GENERATION_TASK": "trimserve.folder.tasks",
        "GENERATOR_TASKS": "trimserve.folder.tasks",
        "GRAPH_FOLDER": "trimserve.folder.names",
        "MANIFEST_NAME": "trimserve.folder.names",
        "Manifest": "trimserve.folder.manifest",
        "Source": "trimserve.folder.manifest",
        "TEXT2TEXT_TASK": "trimserve.folder.tasks",
        "TOKENIZER_NAME": "trimserve.folder.names",
        "TrimmedFolder": "trimserve.folder.opening",
        "VOCAB_NAME": "trimserve.folder.names",
        "check_plain_name": "trimserve.folder.names",
        "is_trimmed": "trimserve.folder.manifest",
        "list_files": "trimserve.folder.opening",
        "open_folder": "trimserve.folder.opening",
        "read_manifest": "trimserve.folder.manifest",
        "stored_weight_bytes": "trimserve.folder.manifest",
        "with_verification": "trimserve.folder.manifest",
        "write_manifest": "trimserve.folder.manifest",
    },
)
