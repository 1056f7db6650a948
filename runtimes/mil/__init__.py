"""A reference evaluator for Core ML's ML programs: computes a saved .mlpackage with numpy, on any machine."""
