"""What is not the method, so a reader of the paper never needs it: files, settings, runs, tables.

The rule: no file here imports model, lora, molex, data, eval or train. It is handed what it needs
of them: dictionaries, tensors, texts, functions, classes. If it knows what a layer is, it belongs
to the six; if it knows what a file is, it belongs here.
"""
