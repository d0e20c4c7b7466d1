"""Quick judgement of an encoder by its features of a labelled folder.

``quick_probe`` is the whole of it, out of ``encoder``, ``features``, ``knn`` and ``linear``.
"""
