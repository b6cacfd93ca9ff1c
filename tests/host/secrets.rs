//! Where secrets are, and above all where they are not.
