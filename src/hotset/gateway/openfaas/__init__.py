"""Compatible with OpenFaaS: its REST API, in both roles (gateway, and provider behind an OpenFaaS gateway).

types.py         the JSON documents, as records
naming.py        NAME, NAME.NAMESPACE and which function they mean
labels.py        the scaling and retry labels, checked at deployment
resources.py     which GPU memory a deployment asks for, by any of the ways it can be said
images.py        what an image names: a pushed bundle, or a path the server may read
functions.py     /system/functions, /system/function/NAME
scaling.py       how many replicas are wanted; /system/scale-function, /system/alert
secrets.py       /system/secrets
namespaces.py    /system/namespaces, /system/namespace
queue.py         /async-function: durable calls, retries, callbacks
callbacks.py     where a callback may go
prometheus.py    the metrics and the one query of OpenFaaS clients
service.py       all of it put together
"""
