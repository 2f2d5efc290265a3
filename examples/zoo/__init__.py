"""Real models with real task metrics, loaded from packages of the Python registry.

- `smollm2`: SmolLM2-135M (Llama decoder), perplexity on Wikipedia text
- `vit_focus`: ViT-S/14 backbone and convolutional focus decoder, linear probe on digits
- `whisper_tiny`: Whisper tiny.en, word error rate on five LibriVox clips
- `minilm`: MiniLM-L6 sentence encoder, rank correlation on WordSim-353
- `efficientnet`: EfficientNet-Lite0 (BatchNorm), twenty labelled photos
- `crepe`: CREPE pitch tracker (BatchNorm behind ReLU), error in cents on tones
- `text`: the Wikipedia text itself

Every metric takes a plain function, so the same call measures an eager and a compiled model.
Install the carriers with `make assets`; converted files are kept under `$SPARSECC_ASSETS`
(default `~/.cache/sparsecc/assets`).
"""

import os

# Everything loads from local files: a look-up on the network could only add delay or fail.
os.environ["HF_HUB_OFFLINE"] = "1"
