"""Where every file lies and how its rows are read and written. Imports nothing but `syntriever.errors`."""
