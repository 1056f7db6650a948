"""Files that stock clients want beside or inside the methods."""
