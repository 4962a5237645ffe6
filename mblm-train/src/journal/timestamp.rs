//! The current time, in UTC, as text for logs and folder names.

use jiff::civil::DateTime;
use jiff::tz::Offset;

/// A moment in UTC, to the microsecond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp(DateTime);

impl Timestamp {
    /// Now.
    pub fn now() -> Self {
        Timestamp(Offset::UTC.to_datetime(jiff::Timestamp::now()))
    }

    /// Reads what [`Display`](std::fmt::Display) writes, with or without a fraction of a second.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        text.contains([' ', 'T']).then(|| text.parse().ok().map(Timestamp))?
    }

    /// Seconds since 1970.
    pub fn seconds(&self) -> f64 {
        Offset::UTC.to_timestamp(self.0).map_or(f64::NAN, |moment| moment.as_microsecond() as f64 / 1e6)
    }

    /// `20240229-130507`, for names of folders.
    pub fn compact(&self) -> String {
        self.0.strftime("%Y%m%d-%H%M%S").to_string()
    }
}

/// `2024-02-29 13:05:07.000042`, as in the reference package's logs.
impl std::fmt::Display for Timestamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.strftime("%Y-%m-%d %H:%M:%S.%6f"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_unix(seconds: i64, micros: i32) -> Timestamp {
        Timestamp(Offset::UTC.to_datetime(jiff::Timestamp::new(seconds, micros * 1000).unwrap()))
    }

    #[test]
    fn text_is_read_back() {
        for seconds in [0, 951_782_400, 1_709_211_907, 4_107_542_399, 4_107_542_400] {
            let moment = from_unix(seconds, 250_000);
            assert_eq!(Timestamp::parse(&moment.to_string()), Some(moment));
            assert_eq!(moment.seconds(), seconds as f64 + 0.25);
        }
        let short = Timestamp::parse("2024-02-29T13:05:07.5").unwrap();
        assert_eq!(short.seconds(), 1_709_211_907.5);
        for text in ["", "2024-02-29", "2024-13-01 00:00:00", "2024-12-01 18446744073709551615:00:00", "a-b-c d:e:f"] {
            assert_eq!(Timestamp::parse(text), None, "{text}");
        }
    }

    #[test]
    fn known_moments() {
        assert_eq!(from_unix(0, 0).to_string(), "1970-01-01 00:00:00.000000");
        let leap_day = from_unix(1_709_211_907, 42);
        assert_eq!(leap_day.to_string(), "2024-02-29 13:05:07.000042");
        assert_eq!(leap_day.compact(), "20240229-130507");
        assert_eq!(from_unix(4_107_542_399, 0).to_string(), "2100-02-28 23:59:59.000000");
        assert_eq!(from_unix(4_107_542_400, 0).to_string(), "2100-03-01 00:00:00.000000");
        assert_eq!(from_unix(1_735_689_599, 0).to_string(), "2024-12-31 23:59:59.000000");
    }
}
