"""Weights of 8 and 4 bits with int8 inputs, on a CPU: made from an ordinary checkpoint once.

``int8_model.py`` and ``int4_model.py`` say what becomes of a model, ``rotation.py``,
``channels.py`` and ``blocks.py`` how; ``stored.py`` keeps the result, ``parts.py`` gives it to the
decoder.  ``products.py`` multiplies in plain torch: the definition of each product's arithmetic,
and what runs where there is no kernel.
"""
