"""Take a tuned model or an adapter out of the library, and bring an adapter back in.

From the ground up: the model card, Transformers' format, PEFT's, our own, and upload.
"""
