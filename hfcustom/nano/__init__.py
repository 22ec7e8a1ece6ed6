"""A vision-language model from scratch: read vision.py, projector.py, language.py, then model.py."""
