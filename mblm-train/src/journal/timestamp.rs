//! The current time, in UTC, as text for logs and folder names.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

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
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.strftime("%Y-%m-%d %H:%M:%S.%6f"))
    }
}

/// Writes the current time as [`Timestamp`] is shown. A signal handler may call it, on the few kilobytes of its own stack:
/// it uses no library, no lock and no memory of the heap.
pub fn write_now(to: &mut dyn fmt::Write) -> fmt::Result {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    write_moment(now.as_secs(), now.subsec_micros(), to)
}

/// Days become dates as in Howard Hinnant's `civil_from_days`: in eras of 400 years, in years that begin in March.
fn write_moment(seconds: u64, micros: u32, to: &mut dyn fmt::Write) -> fmt::Result {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    write!(to, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{micros:06}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_writes_the_same_time() {
        for seconds in (0..4_200_000_000).step_by(86_399 * 17).chain([951_782_400, 1_709_211_907, 4_107_542_399]) {
            let mut text = String::new();
            write_moment(seconds, 42, &mut text).unwrap();
            assert_eq!(text, from_unix(seconds as i64, 42).to_string());
        }
    }

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
