//! As much of header compression as can be told without a table (RFC 7541).

/// Whether a header block leaves the table as it is. Then it has to be decoded only by who wants to
/// know its fields.
pub(super) fn leaves_table(mut block: &[u8]) -> bool {
    while let Some(&first) = block.first() {
        let rest = match first {
            // An index stands for the field (§6.1).
            0x80.. => integer(block, 7).map(|(_, rest)| rest),
            // Goes into the table (§6.2.1), or changes its size (§6.3).
            0x20..=0x7f => None,
            // Does not (§6.2.2, §6.2.3).
            ..=0x1f => integer(block, 4).and_then(|(name, rest)| match name {
                0 => after_string(after_string(rest)?),
                _ => after_string(rest),
            }),
        };
        let Some(rest) = rest else {
            return false;
        };
        block = rest;
    }
    true
}

/// What follows a string (§5.2).
fn after_string(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = integer(bytes, 7)?;
    rest.get(length..)
}

/// A number whose first byte has so many bits of it (§5.1), and what follows.
fn integer(bytes: &[u8], bits: u32) -> Option<(usize, &[u8])> {
    let (first, mut rest) = bytes.split_first()?;
    let most = (1 << bits) - 1;
    let mut number = usize::from(*first) & most;
    if number < most {
        return Some((number, rest));
    }
    for shift in [0, 7, 14] {
        let (byte, after) = rest.split_first()?;
        rest = after;
        number += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((number, rest));
        }
    }
    None
}
