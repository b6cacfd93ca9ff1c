//! Separation: the proof that a key and the data that it protects are on different devices.
