"""Code that two or more stage scripts share; what the paper claims stays in the scripts."""
