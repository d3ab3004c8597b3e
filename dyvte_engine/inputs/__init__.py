"""What the user gives (prompts, pictures, videos) on its way to the rows at the decoder's entry."""
