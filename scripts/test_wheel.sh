#!/usr/bin/env bash
# Builds sdist and wheel (the wheel from the sdist), installs the wheel alone into a fresh environment, without nerfstudio,
# and tries it from a folder that is not this one: every command's --help, the packaged ViT, a lift. Downloads about 3 GB.
#
#   scripts/test_wheel.sh          Python 3.11; FIT3D_PYTHON=3.12 takes another; the files stay in dist/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PATH="$PATH:$PWD/.venv-uv/bin"
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
rm -rf dist
uv build --quiet
ls -lh dist

# What the package reads at run time has to be in both files.
git ls-files fit3d_ns | sort >"$place/wanted"
for archive in dist/*; do
    python3 - "$archive" >"$place/found" <<'PYTHON'
import sys, tarfile, zipfile
path = sys.argv[1]
names = zipfile.ZipFile(path).namelist() if path.endswith(".whl") else tarfile.open(path).getnames()
print("\n".join(sorted(name[name.index("fit3d_ns/"):] for name in names if "fit3d_ns/" in name)))
PYTHON
    missing=$(comm -23 "$place/wanted" <(sort "$place/found"))
    [ -z "$missing" ] || { echo "test_wheel.sh: $archive lacks $missing" >&2; exit 1; }
done

SECONDS=0
uv venv --quiet --python "${FIT3D_PYTHON:-3.11}" "$place/env"
uv pip install --quiet --python "$place/env/bin/python" dist/*.whl
echo "installed in $SECONDS s"
PATH="$place/env/bin:$PATH"
cd "$place"
SECONDS=0
for command in "$place"/env/bin/fit3d-*; do
    "$command" --help >/dev/null || { echo "test_wheel.sh: ${command##*/} --help failed" >&2; exit 1; }
done
fit3d-info
fit3d-synthesize --output-dir rooms --num-scenes 1 --num-frames 6 --width 64 --height 48
fit3d-lift --surface depth --data rooms/room_00 --backbone toy_rooms_vit --output-path room.safetensors
fit3d-push "$(python -c 'from fit3d_ns.features.sources import TOY_FOLDER; print(TOY_FOLDER)')" somebody/toy
python - <<'PYTHON'
import fit3d_ns, torch
from importlib import metadata, resources
from fit3d_ns.features import create_extractor
from fit3d_ns.scene import load_scene

assert metadata.version("fit3d-ns") == fit3d_ns.__version__ and "site-packages" in fit3d_ns.__file__
assert resources.files("fit3d_ns").joinpath("py.typed").is_file()
tokens = create_extractor("toy_rooms_vit")(torch.rand(1, 3, 48, 64)).patch_tokens
assert tokens.shape == (1, 48, 192) and tokens.std() > 0.1
assert load_scene("room.safetensors").gaussians.num_gaussians > 100
PYTHON
echo "tried in $SECONDS s: the wheel works."
