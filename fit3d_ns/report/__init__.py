"""Tables and pictures out of results; the only room with matplotlib and gradio."""
