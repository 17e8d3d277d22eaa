"""The function contract: what a user's code must look like, and how calls get in and out of it.

    units.py       "600MiB" -> bytes, "30s" -> seconds
    contract.py    @hotset.function and the options it attaches
    tensors.py     numpy.ndarray and torch.Tensor <-> JSON, raw bytes, .npy
    images.py      PIL.Image <-> image files
    codecs.py      which codec belongs to which type
    encoding.py    results -> answer bodies, streams -> NDJSON or SSE
    signature.py   predict's typed signature: decode, encode, JSON schema
    inspection.py  a decorated object -> its signature, or what breaks the contract
    problems.py    decoding errors -> the field and the problem
    loading.py     "module:Class" in a directory -> the decorated object
    runtime.py     what a GPU process holds: load, call, call_batch, unload

Nothing here imports a server, a scheduler or an ML framework; numpy, PIL and torch are imported only when a function's
signature names their types.
"""
