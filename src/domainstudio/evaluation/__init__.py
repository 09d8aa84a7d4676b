"""Measurement: features of images, metrics of features, and the report that shows them."""
