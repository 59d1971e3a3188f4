#!/usr/bin/env bash
# Make the pictures in docs/pictures from images that `arrowhead demo` draws: three minutes on two cores.
# Without ImageNet weights (no network) the body is random and the accuracy lower; the output says so.
set -euo pipefail
pictures=$(cd "$(dirname "$0")" && pwd)/pictures
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
cd "$work"

arrowhead demo
arrowhead lr-find demo/fit/store
arrowhead train demo/fit/store demo/best --grid "rate=1e-4..1e-1:4 weight_decay=0,1e-2 seed=0,1,2"
arrowhead train demo/fit/store demo/folded --folds 5 --learning-curve

# The report as a browser shows it (Debian: apt-get install chromium). Root needs --no-sandbox.
arrowhead examine demo/fit/store demo/fit/bundle demo/report
chromium --headless --no-sandbox --hide-scrollbars --window-size=1200,1150 \
    --screenshot="$pictures/report.png" "file://$work/demo/report/report.html"

cp demo/fit/bundle/report/confusion.png demo/scores/scores.png demo/fit/store/lr_finder.png \
    demo/folded/report/learning_curve.png "$pictures"
