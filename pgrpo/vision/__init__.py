"""Images in prompts, up to the model. Begin with ``reader.py``, which turns a row's images into tokens and keeps their files;
``files.py`` reads and checks a file, ``processors.py`` has what families of models make of an image, ``rows.py`` finds the rows of
images in a packed batch. The model's side is ``model/families/vision.py``.
"""
