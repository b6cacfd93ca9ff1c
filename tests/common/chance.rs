//! Moments that nobody chose.

/// What is random enough for moments, and can be had again.
pub struct Chance(u64);

impl Chance {
    /// By `CHANCE`, if that is set.
    pub fn new() -> Self {
        let seed = std::env::var("CHANCE").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
        println!("CHANCE={seed}");
        Self(seed)
    }

    /// One of the numbers from 0 to before this.
    pub fn below(&mut self, end: u64) -> u64 {
        // xorshift64 (Marsaglia 2003).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}
