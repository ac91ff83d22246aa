"""Writers of recipes: an allocation as the text that another quantizer reads. Text in, text out; no tensors."""
