"""From a posted request to a job in the queue: admission, body, video, frames."""
