"""Checkpoints: everything needed to resume a run, written while training continues.

    runs/<id>/checkpoints/index.json                                 every checkpoint, oldest first
    runs/<id>/checkpoints/step-000050-1a2b3c4d/part-00000-of-00002.safetensors   what one rank wrote
                                               part-00000-of-00002-1.safetensors its next file, if it has several
                                               part-00000-of-00002.json          their digests and byte offsets
                                               manifest.json                     written last: all parts, and the state

A part holds the fp32 weight and Adam's two moments of parameter shards that its rank writes; the rank's last part also
holds its random state. Frozen weights are never written. Each shard is stored with its parameter's name and its
position in that parameter, so any number of ranks under any ZeRO stage can resume, and each rank reads only the bytes
it needs.

A checkpoint counts only if the index lists it. The index lists it once its manifest, and so every part, is on storage.
If the index is missing or damaged, the manifests are used instead. A failed save leaves the index and the checkpoints
in it unchanged.

    manifest.py   the files of a checkpoint, and reading them
    save.py       saving in a background thread, through a staging buffer of bounded size
    report.py     events and warnings about saves
    resume.py     restoring the newest intact checkpoint
    waiting.py    waiting for the background threads of all ranks
"""
