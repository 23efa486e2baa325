#!/usr/bin/env bash
# Builds an image where no Docker daemon runs and no registry of images is at hand: `deploy/build_without_docker.sh [TARGET] [TAG]`.
# As root on Debian, with buildah, podman and debootstrap installed. The base is made by debootstrap; pip's configuration,
# certificates and local wheels of this machine are mounted for the build alone. `docker build --target cpu .` is the usual way.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-cpu}
tag=${2:-localhost/hnet-serve:$target}
base=localhost/hnet-base:bookworm
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo '{"default": [{"type": "insecureAcceptAnything"}]}' > "$work/policy.json"
buildah() { command buildah --storage-driver overlay "$@"; }

if ! buildah inspect "$base" > /dev/null 2>&1; then
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$work/rootfs"
    tar -C "$work/rootfs" -cf "$work/rootfs.tar" .
    printf 'FROM scratch\nADD rootfs.tar /\n' > "$work/Dockerfile"
    buildah bud --isolation chroot --signature-policy "$work/policy.json" --tag "$base" "$work"
fi

# pip's own configuration, but with this machine's certificates at a place that is not the image's.
cp /etc/ssl/certs/ca-certificates.crt "$work/certificates.crt"
{
    printf '[global]\ncert = /run/certificates.crt\n'
    python3 -m pip config list | sed -nE "s/^global\.(index-url|find-links)='(.*)'$/\1 = \2/p"
} > "$work/pip.conf"
mounts=(--volume "$work/pip.conf:/etc/pip.conf:ro" --volume "$work/certificates.crt:/run/certificates.crt:ro")
for folder in $(sed -n 's/^find-links = //p' "$work/pip.conf"); do
    if [ -d "$folder" ]; then mounts+=(--volume "$folder:$folder:ro"); fi
done

buildah bud --isolation chroot --network host --layers --signature-policy "$work/policy.json" "${mounts[@]}" \
    --build-arg CPU_BASE="$base" --build-arg CUDA_BASE="$base" --build-arg TORCH_INDEX= \
    --build-arg REVISION="$(git rev-parse HEAD)" --target "$target" --format docker --tag "$tag" .
