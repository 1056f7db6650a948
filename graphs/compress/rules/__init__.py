"""Rules by which `prune` keeps tokens: modules over tokens in operators that every target takes."""
