"""Export to CTranslate2, Hugging Face and ONNX, import from Marian and BERT folders."""
