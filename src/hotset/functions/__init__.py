"""The function contract: what a user's code must look like, and how calls get in and out of it.

    units.py       "600MiB" -> bytes, "30s" -> seconds
    contract.py    @hotset.function and the options it attaches
    tensors.py     numpy.ndarray and torch.Tensor <-> JSON, raw bytes, .npy
    images.py      PIL.Image <-> image files
    media.py       media types, and how a Content-Type is read
    codecs.py      what a codec is, and the plain ones: bytes, text
    annotations.py which codec belongs to which type of a signature
    encoding.py    results -> answer bodies, streams -> NDJSON or SSE
    signature.py   predict's typed signature: decode, encode, JSON schema
    inspection.py  a decorated object -> its signature, or what breaks the contract
    problems.py    decoding errors -> the field and the problem
    loading.py     "module:Class" in a directory -> the decorated object
    http_envelope.py  a whole HTTP request as one body, for functions that speak HTTP themselves
    process.py     a command as a function, in OpenFaaS's watchdog contract
    v2*.py         the Open Inference Protocol v2: calls, types, tensors, bytes
    model_files/   functions made of a model file, without code
    runtime.py     what a GPU process holds: load, call, call_batch, unload

Nothing here imports a server, a scheduler or an ML framework; numpy, PIL and torch are imported only when a function's
signature names their types.
"""
