"""What each number of a deployed program is kept in."""
