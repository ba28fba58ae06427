use aws_lc_rs::rand;

use crate::error::{Error, Result};

/// Base 62, in ASCII order.
pub(super) const ALPHABET: &[u8; 62] =
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Makes a random text of letters and digits; each character holds 5.95 bits.
///
/// # Errors
/// `Internal` when the random source fails.
pub fn random_alphanumeric(chars: usize) -> Result<String> {
    let mut text = String::with_capacity(chars);
    let mut byte = [0_u8];
    while text.len() < chars {
        rand::fill(&mut byte).map_err(|_| Error::internal("the random source failed"))?;
        // 248 is the largest multiple of 62 in a byte: beyond it some characters would be likelier.
        if byte[0] < 248 {
            text.push(char::from(ALPHABET[usize::from(byte[0] % 62)]));
        }
    }
    Ok(text)
}
