"""The kernels against slow loops and the project's own functions: on a GPU, or interpreted."""
