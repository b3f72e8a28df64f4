#!/bin/sh
# Repeat the studies on Fashion-MNIST that docs/cardinality.md shows, and copy their reports to docs/study.
# Usage, from the root of the repository: sh docs/fashion-mnist.sh [DATASET]
# Debian's package dataset-fashion-mnist installs the default dataset. If stopped, the same command resumes.
set -eu
dataset=${1:-/usr/share/datasets/fashion-mnist}
studies=studies/fashion-mnist

study() {
    kind=$1
    shift
    resnext-hub study "$kind" --dataset "$dataset" --study-dir "$studies/$kind" --depth 20 --width-scale 0.25 \
        --match macs --image-size 14 --epochs 0.5 --warmup-epochs 0.05 --eval-every 0.1 "$@"
}

study cardinality --seeds 5
study resnet --seeds 5 --merge "$studies/cardinality"
study resnet --seeds 5
for kind in shortcuts doubling; do
    study "$kind" --seeds 3 --merge "$studies/cardinality"
    study "$kind" --seeds 3
done

for kind in cardinality resnet shortcuts doubling; do
    mkdir -p "docs/study/$kind"
    cp "$studies/$kind/plots/"*.png "$studies/$kind/report.json" "docs/study/$kind/"
    # without the table of runs, whose cards stay in the study folder
    sed -e '/^## Runs/,$d' -e 's/](plots\//](/' "$studies/$kind/README.md" > "docs/study/$kind/README.md"
done
