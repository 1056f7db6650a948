"""vlmx compiles vision-language models for the hardware they must run on."""
