"""How does an export run under transformers, on a machine without this package?

`modeling_titans.py` and `configuration_titans.py` are the classes transformers loads. `flatten.py` puts them into an export
together with the package's own model and memory, rewritten to lie side by side in one folder: there is no second copy of the
model to keep right.
"""
